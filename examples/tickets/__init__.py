"""A support desk: sort a ticket, then take out what it is about."""
