"""All SQL but the migrations'. One file a noun; each function is one statement, and says what it takes and returns.

Every statement carries its own access check or runs in a transaction that has made it. A write of something
durable happens under the conversation's row lock: `send` takes it inside its one statement, all others by
`conversations.lock` or `messages.lock` first, so that what they look at afterwards holds until they commit.
"""
