"""For those who work on the program; nothing in it imports them."""
