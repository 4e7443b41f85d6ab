"""What requests look like on the wire."""
