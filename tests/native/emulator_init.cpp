// SPDX-License-Identifier: Apache-2.0
// The first and only process of the emulated machine of run_avx512_emulated.sh: runs
// the test program with its own arguments, reports the exit status and switches off.
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdio>

int main(int, char** argv) {
  const pid_t child = fork();
  if (child == 0) {
    execv("/pybsp_selftest", argv);
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  std::printf("pybsp_selftest: exit status %d\n",
              WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  std::fflush(stdout);
  tcdrain(STDOUT_FILENO);
  reboot(RB_POWER_OFF);
}
