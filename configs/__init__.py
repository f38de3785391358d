"""The shipped configs, as users edit them; a package so that an installed `circuit` finds them."""
