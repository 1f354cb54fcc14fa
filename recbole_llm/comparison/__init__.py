"""Many runs on the same samples: plan, workers, controls, search, analysis and report."""
