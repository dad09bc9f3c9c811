"""The commands of `ftc`, by what a user does with them. Nothing heavy is imported before a command runs."""
