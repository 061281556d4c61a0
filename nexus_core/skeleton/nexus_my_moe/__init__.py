"""The my_moe family for NEXUS."""
