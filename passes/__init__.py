"""The passes, one a file, the file named after the pass; the pipelines stand here as visible lists."""

assert __name__ == "ftc.passes", f"import this package as ftc.passes, not as {__name__}"
