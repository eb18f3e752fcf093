"""Group Relative Policy Optimisation for language models with verifiable rewards."""
