"""Programs to distil, with stand-in teachers that answer without a paid model."""
