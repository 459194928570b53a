"""What touches disk or hub: base weights, adapters, run folders."""
