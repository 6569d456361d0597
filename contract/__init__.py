"""What every room agrees on: model configs, tensor and op specs, tolerances, file formats. Needs numpy alone."""
