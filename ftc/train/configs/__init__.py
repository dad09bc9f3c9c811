"""The run files that come with ftc; ftc.train.shipped finds them."""
