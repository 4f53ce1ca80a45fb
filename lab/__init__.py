"""The paper's measurements, each a module and a command."""

import commandline as commandline  # whose hook makes an interrupt while torch loads one line
