"""Measures of how much of a long text a model uses: passkey, needle, and perplexity over sliding windows."""
