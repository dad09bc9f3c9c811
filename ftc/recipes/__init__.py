"""Recipes: an ordered list of stages in a TOML file, run by `ftc run`. See docs/recipes.md."""
