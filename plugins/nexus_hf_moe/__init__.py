"""Mixture-of-experts families of Hugging Face with dense experts, one table row each."""
