"""The toy_moe family for NEXUS."""
