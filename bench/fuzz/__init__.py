"""``hstu-trt bench fuzz``: bad input to a deployment, its oracle and its verdicts."""
