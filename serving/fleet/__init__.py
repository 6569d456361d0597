"""Several replicas of a deployment behind a gateway, and releases that fail no request."""
