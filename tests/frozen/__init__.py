"""What a rebuild may not change: a record of the program's outputs, and files that earlier versions wrote."""
