"""``hstu-trt diff``: where two score files, or two runners, part."""
