"""The Ray shells: each file makes one core a named, detached actor. They hold no logic of their own."""
