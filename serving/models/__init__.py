"""What runs inside tritonserver: the Python models, their stages, queues and what they hold."""
