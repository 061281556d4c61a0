"""The GPT-OSS family for NEXUS: MXFP4 numbers, packed experts, the model, and the hooks that core asks."""
