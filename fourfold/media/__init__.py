"""Images, video and sound, decoded within limits and cut into patches."""
