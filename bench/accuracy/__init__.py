"""Do other runners and precisions score as PyTorch in fp32 does? Metrics, fidelity, gates, and a plan for fp8."""
