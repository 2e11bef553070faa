"""Short scripts on the public API of bilevel; nothing imports them."""
