"""The commands: a file each, thin. They read what was typed, call the rooms beside this folder, and print."""
