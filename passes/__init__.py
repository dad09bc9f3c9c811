"""The passes, one a file, the file named after the pass; the pipelines stand here as visible lists."""

assert __name__ == "ftc.passes", f"import this package as ftc.passes, not as {__name__}"

# raise-mla is not among them: only what caches latents wants it, and the passes that divide attention over ranks read the expanded spelling.
# Order matters: a mixture of experts is one node before the gates of its experts are looked at one by one; the norms and rotations inside attention are raised before attention looks through them.
PIPELINES = {
    "raise": ["raise-moe", "raise-norm", "raise-rope", "raise-attention", "raise-mlp"],
}
