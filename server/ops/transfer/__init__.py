"""Exports and imports: whole installations as lines of JSON (docs/transfer.md), and exports of other chats."""
