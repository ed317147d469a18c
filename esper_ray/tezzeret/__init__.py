"""Tezzeret: builds, checks, measures and compiles kernels. Only the job processes (`job`, `compiler`) load torch."""
