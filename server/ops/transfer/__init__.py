"""Moving in and out: a whole installation as lines of JSON (docs/transfer.md), and what other chats export."""
