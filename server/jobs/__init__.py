"""What happens to messages later: scheduled sends, expiry, push, previews."""
