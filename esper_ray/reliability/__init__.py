"""What all rooms share: a durable journal, a breaker, atomic files, injectable time, identifiers."""
