// SPDX-License-Identifier: Apache-2.0
// The first and only process of the machine of run_avx512_emulated.sh: runs the test
// program, reports its exit status and switches off. Its own arguments are words of the
// kernel's command line.
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdio>

int main() {
  const pid_t child = fork();
  if (child == 0) {
    execl("/pybsp_selftest", "pybsp_selftest", "--quick", nullptr);
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
