"""The network, its stock parts, and what of it trains."""
