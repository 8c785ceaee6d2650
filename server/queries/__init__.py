"""All SQL but the migrations'. One file a noun; each function is one statement, and says what it takes and returns.

Every statement carries its own access check or runs in a transaction that has made it. A write of something
durable happens under the conversation's row lock: `send` takes it inside its one statement, all others by
`conversations.lock_as` or `messages.lock` first, so that what they look at afterwards holds until they commit. No frame
locks a row of a conversation for a user whom it refuses for lack of a part there: both ask for the part before the
lock, and the handler asks again under it. `conversations.lock` asks nothing: it is for jobs, operators and `join`.

Transactions lock in one order, so that no two ever wait for each other (docs/decisions/0032-one-lock-order.md):

1. the conversation: `conversations.lock_as`, `messages.lock`; several in the order of their ids
2. users whose own clock moves, or who must be active: `users.lock`, once, for all of them, in the order of their ids
3. what is theirs: participants, sessions, accounts, drafts, stars, follows, relationships, endpoints, what they have
   scheduled
4. the chain of the audit log: `audit.record`

A step may be left out; nobody goes back. A statement of one row needs no lock before it. The parts of one statement run
in no particular order, so a statement that changes both a user and what is theirs makes the second depend on the first.
An INSERT locks the rows that its foreign keys name, and so does the second UPDATE of a row in one transaction. Where
they name a conversation, `conversations.keep` comes before the lock of a user.
A job that takes rows of many people skips those that are locked. `send`, which stores messages of many, waits only
for conversations, and some milliseconds for other rows (docs/decisions/0062-the-common-statement-waits-for-nobody.md).
"""
