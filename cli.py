from codebook.cli import main

main()
