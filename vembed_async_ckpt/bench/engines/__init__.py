"""The engines that are measured, one small class each, configured as `catalog` says."""
