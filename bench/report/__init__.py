"""``hstu-trt bench report``: all results as one page, and the HTML and SVG that other reports use too."""
