"""What each frame does: one function a frame, one file a noun. A handler takes the context and the frame and
returns its result, after the commit; it raises Refused for what may not be. It never sees a socket.
"""
