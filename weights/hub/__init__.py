"""Fetching vision towers and adapters from the Hugging Face Hub, or from its cache on this machine."""
