"""What is run: the console command, comparisons, studies and benchmarks. Composes all the rest."""
