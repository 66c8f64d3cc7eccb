"""One module for each measure: `measure(bench)` visits the engines and returns every sample, raw."""
