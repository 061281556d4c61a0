"""DeepSeek-V3 for NEXUS: its routing, its layers, and its fp8 storage."""
