"""Growth in other libraries' training loops, a file each; each needs its library, and importing fxgrow imports none."""
