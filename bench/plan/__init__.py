"""``hstu-trt bench plan``: how many machines a rate needs, from measured rows and simulated queues."""
