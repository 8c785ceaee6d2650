"""Handlers: one function per frame, one file per noun. A handler takes the context and the frame. After its commit it
returns the result, or it raises Refused. It never uses a socket.
"""
