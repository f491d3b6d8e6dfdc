"""Simulated robots: where demonstrations come from and waypoints are tried."""
