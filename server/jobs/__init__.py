"""Periodic and deferred work: scheduled sends, expiry, push notifications, link previews."""
