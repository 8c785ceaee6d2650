"""The servers that OpenChat is compared with."""
