"""All SQL except migrations, with a file per noun. Each function runs one statement, and documents its parameters and
its result.

Every statement checks access itself, or runs in a transaction that has done so. A durable write happens under the
conversation's row lock. Statements for many users, such as that of `send`, take the lock themselves. All others call
`conversations.lock_as` or `messages.lock` first, so that all later reads stay true until they commit.

No frame locks a conversation's row for a user whom it refuses as no participant. Both functions check that before the
lock, and the handler checks it again under the lock. `conversations.lock` checks nothing. Jobs and operators use it.

Transactions take locks in one order, so that no two wait for each other (docs/decisions/0032-one-lock-order.md):

1. The conversation: `conversations.lock_as`, `messages.lock`. Several are locked in the order of their ids.
2. Users whose user version moves, or who must be active: `users.lock`, once for all of them, in the order of their ids.
  `conversations.lock_as_with_user` does both steps.
3. Rows of these users: participants, sessions, accounts, drafts, stars, follows, relationships, endpoints, scheduled
  messages.
4. The chain of the audit log: `audit.record`.

A transaction may skip steps, but never goes back. A statement on one row needs no lock before it. The parts of one
statement run in any order. So a statement that changes both a user and the user's rows makes the second part depend on
the first.

An INSERT locks the rows of its foreign keys, and so does the second UPDATE of a row in one transaction. If they refer
to a conversation, `conversations.keep` comes before the lock of a user.

A job that takes rows of many users skips locked ones. `send`, which stores messages of many users, waits only for
conversations, and some milliseconds for other rows (docs/decisions/0062-the-common-statement-waits-for-nobody.md).
"""
